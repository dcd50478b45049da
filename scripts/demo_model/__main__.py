"""`python -m scripts.demo_model train | export | evaluate`."""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.demo_model", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train a model for a number of minutes")
    train.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    train.add_argument("--minutes", type=float, default=30.0)
    train.add_argument("--from", type=Path, dest="start", help="go on from an earlier `--out`")
    train.add_argument("--threads", type=int, default=2)
    train.add_argument(
        "--no-compile", action="store_true", help="do without torch.compile (no C++ compiler)"
    )

    export = commands.add_parser("export", help="write the GGUF and safetensors files")
    export.add_argument("--checkpoint", type=Path, required=True, help="the folder of `train`")
    export.add_argument("--root", type=Path, default=Path(), help="the repository to write to")

    evaluate = commands.add_parser("evaluate", help="bits per byte on the held-out files")
    model = evaluate.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, help="the folder of `train`")
    model.add_argument("--gguf", type=Path, help="a GGUF file, read with libllama")

    # The heavy imports stay behind the choice of the command.
    args = parser.parse_args()
    if args.command == "train":
        from scripts.demo_model.train import train as run_train

        run_train(args.out, args.minutes, args.threads, not args.no_compile, args.start)
    elif args.command == "export":
        from scripts.demo_model.export import export as run_export

        run_export(args.checkpoint, args.root)
    else:
        from scripts.demo_model.evaluate import evaluate as run_evaluate

        run_evaluate(checkpoint=args.checkpoint, gguf=args.gguf)


if __name__ == "__main__":
    main()
