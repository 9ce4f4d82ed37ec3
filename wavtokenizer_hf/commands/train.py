"""`wavtokenizer train`: train a new model, or fine-tune one."""

import argparse

from ..model_names import find_torch_model
from ..training import settings
from .arguments import Commands, add_command, print_facts, quiet_transformers


def add(commands: Commands) -> None:
    train = add_command(
        commands,
        "train",
        _train,
        "Settings come from a recipe, from the options below, or from both; options override the recipe. --output, "
        "--train-data and --validation-data are always needed. On several GPUs: accelerate launch -m wavtokenizer_hf "
        "train ... Needs the extra `training`.",
        example="small_cpu --train-data clips --validation-data other_clips --output run",
    )
    settings.add_arguments(train)


def _train(arguments: argparse.Namespace) -> int:
    run_settings = settings.read_arguments(arguments)
    run_settings.model = run_settings.model and find_torch_model(run_settings.model)

    quiet_transformers()

    from ..training import train

    state = train(run_settings)
    facts = {
        "output": state.settings.output,
        "steps": state.step,
        "best_validation_score": state.best_score,
        "clips_skipped": len(state.skipped),
    }
    if state.accelerator.is_main_process:
        print_facts(facts, arguments.json)
    return 0
