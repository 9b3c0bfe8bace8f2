"""Export an evaluation: vla-eval's results file, an entry of its leaderboard, or recordings for Rerun's viewer."""

import json
import sys

from defi_platform.config import ExportEvaluationConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import ConfigError, exit_code, one_line

LAYOUTS = ("results", "leaderboard", "rerun")


def main() -> int:
    """Runs the job. Returns: the exit code."""
    config = parse_arguments(ExportEvaluationConfig, description=__doc__)
    if config.layout not in LAYOUTS:
        raise ConfigError(f"layout is '{config.layout}'; it is one of {', '.join(LAYOUTS)}.")
    if config.layout == "leaderboard" and not (config.model and config.curated_by):
        raise ConfigError("an entry of the leaderboard needs model=KEY and curated_by=NAME.")
    if config.episodes < 1:
        raise ConfigError(f"episodes is {config.episodes}; it must be 1 or more.")
    # Imported late: --help and mistakes in the config should not wait for it.
    from defi_platform import storage
    from defi_platform.evaluate.results.evaluation import read_evaluation
    from defi_platform.evaluate.results.vla_eval import leaderboard_entry, results_file

    evaluation = read_evaluation(config.evaluation)
    if config.layout == "rerun":
        from defi_platform.evaluate.results.rerun_recording import write_recordings

        for path in write_recordings(evaluation, config.output, config.arm, config.episodes):
            print(f"rerun: {path}")
        return 0
    if config.layout == "results":
        content = results_file(evaluation, config.arm)
    else:
        content = leaderboard_entry(
            evaluation,
            model=str(config.model),
            display_name=config.display_name or str(config.model),
            curated_by=f"@{str(config.curated_by).lstrip('@')}",
            finetuned=config.finetuned,
        )
    try:
        storage.write_text(config.output, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(
            f"output={config.output} cannot be written: {one_line(error)}. Name a JSON file in a folder that can."
        ) from error
    print(f"{config.layout}: {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
