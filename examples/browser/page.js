// Audio -> tokens -> audio with onnxruntime-web; the files of `wavtokenizer export-model` lie in model/.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";

ort.env.wasm.numThreads = 1; // more need a server that isolates the page (COOP and COEP)

const element = (id) => document.getElementById(id);
const tell = (text, state) => {
  element("status").textContent = text;
  document.body.dataset.state = state;
};

const config = (await (await fetch("model/wavtokenizer_onnx.json")).json()).model;
const [encoder, decoder] = await Promise.all(
  ["encoder", "decoder"].map((name) => ort.InferenceSession.create(`model/${name}.onnx`, { executionProviders: ["wasm"] })),
);
const context = new AudioContext({ sampleRate: config.sampling_rate }); // decodeAudioData resamples to it

async function run(bytes) {
  tell("Working …", "working");
  try {
    const buffer = await context.decodeAudioData(bytes);
    const samples = new Float32Array(buffer.length);
    for (let channel = 0; channel < buffer.numberOfChannels; channel++) {
      buffer.getChannelData(channel).forEach((value, index) => (samples[index] += value / buffer.numberOfChannels));
    }
    const started = performance.now();
    const input = new ort.Tensor("float32", samples, [1, 1, samples.length]);
    const { audio_codes } = await encoder.run({ input_values: input });
    const encoded = performance.now();
    const codes = new ort.Tensor("int64", audio_codes.data, [1, audio_codes.dims[2]]);
    const { waveform } = await decoder.run({ codes });
    const decoded = performance.now();
    const audio = waveform.data.slice(0, samples.length); // the last token may cover more
    draw("input", samples);
    draw("decoded", audio);
    element("codes").textContent = Array.from(audio_codes.data, Number).join(" ");
    prepareToPlay(audio);
    const seconds = samples.length / config.sampling_rate;
    tell(
      `${seconds.toFixed(2)} s of audio, ${audio_codes.dims[2]} tokens. Encoded in ${Math.round(encoded - started)} ms, ` +
        `decoded in ${Math.round(decoded - encoded)} ms.`,
      "done",
    );
  } catch (error) {
    tell(`Cannot tokenize this: ${error.message ?? error}`, "failed");
  }
}

function draw(id, samples) {
  const canvas = element(id);
  const painter = canvas.getContext("2d");
  painter.clearRect(0, 0, canvas.width, canvas.height);
  painter.fillStyle = "#2456a6";
  const step = samples.length / canvas.width;
  for (let x = 0; x < canvas.width; x++) {
    const part = samples.subarray(Math.floor(x * step), Math.max(Math.floor((x + 1) * step), Math.floor(x * step) + 1));
    const peak = part.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);
    painter.fillRect(x, (canvas.height / 2) * (1 - peak), 1, Math.max(1, canvas.height * peak));
  }
}

function prepareToPlay(audio) {
  const buffer = context.createBuffer(1, audio.length, config.sampling_rate);
  buffer.copyToChannel(audio, 0);
  element("play").disabled = false;
  element("play").onclick = async () => {
    await context.resume();
    const source = new AudioBufferSourceNode(context, { buffer });
    source.connect(context.destination);
    source.start();
  };
}

element("file").onchange = async (event) => run(await event.target.files[0].arrayBuffer());

let recorder = null;
element("record").onclick = async () => {
  if (recorder) {
    recorder.stop();
    return;
  }
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    const parts = [];
    recorder = new MediaRecorder(stream);
    recorder.ondataavailable = (event) => parts.push(event.data);
    recorder.onstop = async () => {
      stream.getTracks().forEach((track) => track.stop());
      recorder = null;
      element("record").textContent = "Record";
      run(await new Blob(parts).arrayBuffer());
    };
    recorder.start();
    element("record").textContent = "Stop";
  } catch (error) {
    tell(`Cannot record: ${error.message}`, "failed");
  }
};

tell("Choose a file, or record.", "ready");
const name = new URLSearchParams(location.search).get("audio"); // index.html?audio=speech.wav: a file beside the page
if (name) {
  const response = await fetch(new URL(name, location.href));
  if (response.ok) run(await response.arrayBuffer());
  else tell(`There is no ${name}.`, "failed");
}
