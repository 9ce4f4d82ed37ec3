"""Texts for the voices of espeak-ng: words that are combined at random for training, and held-out sentences.

Languages have espeak-ng's names. Half of the held-out sentences are in languages that are not in training.
"""

import numpy as np


TRAINING_WORDS = {
    "en-us": "water morning yellow kitchen after people always thing through friend usual choice joy measure church "
    "bring laugh table window strange question very cheap thought garden answer world every school five",
    "en-gb-x-rp": "paper better father bird ocean number picture village green house quick early often music under "
    "chair weather judge voice half zero together mouth singing please what",
    "en-gb-scotland": "road river stone light heart winter under girl brother church loch home small word down cold "
    "fire",
    "de": "Wasser Morgen schön Küche immer Leute Mädchen Straße Freund zwischen Vogel Glück Apfel Zeitung ich auch "
    "Bücher Tag singen fünf Häuser heute Pferd Schule ruhig",
    "fr-fr": "bonjour matin jaune cuisine toujours gens pain rue lumière chanson jardin question heureux vingt "
    "feuille un bon oiseau travail montagne peu juste fille rouge",
    "es": "agua mañana amarillo cocina siempre gente calle perro guitarra jardín pregunta lluvia zapato jueves "
    "corazón ocho niño fuerte viejo llave verde",
    "it": "acqua mattina giallo cucina sempre gente strada cielo giardino domanda zucchero foglia bello notte scuola "
    "ragno spiaggia otto chiave figlio",
    "pt-br": "água manhã amarelo cozinha sempre gente coração irmão chuva jardim pergunta folha noite escola caminho "
    "luz trabalho vinho pão rio",
    "nl": "water morgen geel keuken altijd mensen straat huis school goed vogel vraag vrij lucht zingen tuin ui vijf "
    "groot deur schip jong",
    "pl": "woda rano żółty kuchnia zawsze ludzie ulica dziecko szkoła pytanie ogród chleb źródło książka deszcz pięć "
    "noc świat rzeka ćma",
    "ru": "вода утро жёлтый кухня всегда люди улица ребёнок школа вопрос сад хлеб книга дождь пять ночь мир река "
    "щека цвет",
    "tr": "su sabah sarı mutfak her zaman insanlar sokak çocuk okul soru bahçe ekmek kitap yağmur beş gece dünya "
    "ırmak göz üzüm",
    "fi": "vesi aamu keltainen keittiö aina ihmiset katu lapsi koulu kysymys puutarha leipä kirja sade viisi yö "
    "maailma joki hyvä syödä",
    "cs": "voda ráno žlutý kuchyně vždy lidé ulice dítě škola otázka zahrada chléb kniha déšť pět noc svět řeka "
    "čtyři hlava",
    "el": "νερό πρωί κίτρινο κουζίνα πάντα άνθρωποι δρόμος παιδί σχολείο ερώτηση κήπος ψωμί βιβλίο βροχή πέντε νύχτα "
    "κόσμος ποτάμι",
    "hi": "पानी सुबह पीला रसोई हमेशा लोग सड़क बच्चा स्कूल सवाल बगीचा रोटी किताब बारिश पाँच रात दुनिया नदी घर दोस्त",
    "id": "air pagi kuning dapur selalu orang jalan anak sekolah tanya kebun roti buku hujan lima malam dunia sungai "
    "nyanyi rumah",
    "sw": "maji asubuhi njano jikoni daima watu barabara mtoto shule swali bustani mkate kitabu mvua tano usiku "
    "dunia mto ng'ombe nyumba",
    "vi": "nước buổi sáng màu vàng nhà bếp luôn luôn người đường trẻ em trường câu hỏi vườn bánh mì sách mưa năm đêm",
    "cmn": "水 早上 黄色 厨房 总是 人 街 孩子 学校 问题 花园 面包 书 下雨 五 夜 世界 河 朋友 中国",
}

HELD_OUT_SENTENCES = {
    "en-us": [
        "A narrow bridge led the travelers across to the lighthouse.",
        "She packed her suitcase, locked the office, and caught the evening train.",
        "Nobody remembered where grandfather had hidden the silver coins.",
        "The committee postponed its decision until next Thursday.",
        "Put the kettle on, would you, and tell me how the concert went.",
    ],
    "en-gb-x-rp": [
        "Our neighbours keep bees behind an old brick wall.",
        "If the fog lifts before noon, we shall sail around the island.",
        "He wrote a long letter, folded it twice, and threw it away.",
        "Fresh bread and black coffee were all that she wanted.",
        "The youngest of them could already whistle the whole tune.",
    ],
    "de": [
        "Der alte Bäcker öffnet seinen Laden schon um vier Uhr.",
        "Wir haben gestern einen langen Spaziergang am Fluss gemacht.",
        "Kannst du mir bitte erklären, wie diese Maschine funktioniert?",
        "Im Herbst färben sich die Blätter rot und golden.",
        "Niemand wusste, woher das seltsame Geräusch kam.",
    ],
    "fr-fr": [
        "Le train de nuit traverse lentement la vallée endormie.",
        "Ma grand-mère prépare une tarte aux pommes chaque dimanche.",
        "Pourriez-vous me dire où se trouve la bibliothèque?",
        "Les enfants ont construit une cabane au bord du lac.",
        "Il a oublié son parapluie dans le taxi.",
    ],
    "es": [
        "El pescador volvió al puerto antes de la tormenta.",
        "Mi hermana estudia medicina en una ciudad del norte.",
        "¿Quién ha dejado abierta la ventana del comedor?",
        "Los domingos desayunamos todos juntos en la terraza.",
        "El museo cierra a las seis y media de la tarde.",
    ],
    "da": [
        "Den gamle fisker sidder på kajen og ser ud over havet.",
        "Hun købte tre røde æbler og en flaske mælk.",
        "I morgen tager vi toget til byen for at besøge museet.",
        "Kan du høre, hvor stille der er i skoven?",
        "Børnene løb hurtigt hjem, da det begyndte at regne.",
    ],
    "ro": [
        "Bunicul povestește seara despre munți și despre lupi.",
        "Am cumpărat pâine caldă de la brutăria din colț.",
        "Unde ai pus cheile de la mașină?",
        "Trenul a plecat din gară cu zece minute întârziere.",
        "Copiii desenează un soare mare pe zid.",
    ],
    "hu": [
        "A nagymama minden vasárnap finom levest főz.",
        "Tegnap este sokáig sétáltunk a Duna partján.",
        "Hol van a legközelebbi gyógyszertár?",
        "A kislány piros kabátot és fekete csizmát viselt.",
        "Nem értem, miért nem jött el a barátod.",
    ],
    "ca": [
        "El forner obre la botiga abans de la sortida del sol.",
        "Aquest estiu anirem a la platja amb els cosins.",
        "Qui ha trencat el got que hi havia damunt de la taula?",
        "La meva àvia em va ensenyar a fer torrons.",
        "Plou tant que no es veu l'altra banda del carrer.",
    ],
    "hr": [
        "Stari ribar popravlja mrežu ispred kuće.",
        "Sutra putujemo brodom na najveći otok.",
        "Gdje si kupila te lijepe crvene cipele?",
        "Djeca su cijelo popodne trčala po livadi.",
        "Nitko nije čuo kada je zazvonio telefon.",
    ],
}

# voice variants of espeak-ng; no held-out utterance is spoken by a training voice
TRAINING_VARIANTS = [
    "m1",
    "m2",
    "m3",
    "m4",
    "m6",
    "m8",
    "f1",
    "f2",
    "f4",
    "f5",
    "klatt",
    "klatt3",
    "klatt4",
    "Alex",
    "Alicia",
    "Andrea",
    "Annie",
    "Diogo",
    "Gene",
    "Henrique",
    "Jacky",
    "Lee",
    "Michael",
    "Mike",
    "Storm",
    "adam",
    "anika",
    "antonio",
    "belinda",
    "benjamin",
    "boris",
    "caleb",
    "david",
    "ed",
    "edward",
    "grandma",
    "grandpa",
    "gustave",
    "iven",
    "iven3",
    "john",
    "linda",
    "marcelo",
    "max",
    "michel",
    "norbert",
    "paul",
    "pedro",
    "quincy",
    "rob",
    "robert",
    "sandro",
    "shelby",
    "steph",
    "travis",
    "victor",
    "whisper",
    "zac",
]
HELD_OUT_VARIANTS = [
    "m5",
    "m7",
    "f3",
    "klatt2",
    "Andy",
    "Denis",
    "Marco",
    "Mario",
    "Hugo",
    "aunty",
    "miguel",
    "pablo",
    "steph2",
    "kaukovalta",
]


def random_text(language: str, random: np.random.Generator) -> str:
    """Return two or three clauses of random words and numbers, with punctuation for pauses."""
    words, clauses = TRAINING_WORDS[language].split(), []
    for _ in range(random.integers(2, 4)):
        clause = random.choice(words, size=random.integers(3, 7)).tolist()
        if random.random() < 0.3:  # espeak-ng reads numbers in every language
            clause.insert(random.integers(len(clause)), str(random.integers(1000)))
        clauses.append(" ".join(clause) + random.choice([",", ".", "?", "!", ""]))
    return " ".join(clauses)
