"""`wavtokenizer train`: a new model, or more training for one that is there."""

from ..model_names import find_model
from ..training import settings
from .arguments import add_command, print_facts, quiet_transformers


def add(commands) -> None:
    train = add_command(commands, "train", _train)
    train.description += (
        " Every setting can stand in a recipe, here, or in both, where what stands here counts; output, train_data and "
        "validation_data are always needed. On several GPUs: accelerate launch -m wavtokenizer_hf train ... "
        "Needs the extra `training`."
    )
    settings.add_arguments(train)


def _train(arguments) -> int:
    wanted = settings.read_arguments(arguments)
    wanted.model = wanted.model and find_model(wanted.model)

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
