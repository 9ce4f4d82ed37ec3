"""`wavtokenizer train`: train a new model, or fine-tune one."""

from ..model_names import find_torch_model
from ..training import settings
from .arguments import add_command, print_facts, quiet_transformers


def add(commands) -> None:
    train = add_command(commands, "train", _train)
    train.description += (
        " Settings come from a recipe, from the options below, or from both; options go before the recipe. Needed in "
        "any case: --output, --train-data and --validation-data. On several GPUs: accelerate launch -m "
        "wavtokenizer_hf train ... Needs the extra `training`."
    )
    settings.add_arguments(train)


def _train(arguments) -> int:
    wanted = settings.read_arguments(arguments)
    wanted.model = wanted.model and find_torch_model(wanted.model)

    quiet_transformers()

    from ..training import train

    state = train(wanted)
    facts = {
        "output": state.settings.output,
        "steps": state.step,
        "best_validation_score": state.best_score,
        "clips_skipped": len(state.skipped),
    }
    if state.accelerator.is_main_process:
        print_facts(facts, arguments.json)
    return 0
