"""``python -m modelscope_cnclip.trainers RECIPE`` and ``torchrun … -m modelscope_cnclip.trainers RECIPE``."""

from modelscope_cnclip.cli import main

if __name__ == "__main__":
    import sys

    sys.exit(main(["train", *sys.argv[1:]]))
