"""`python -m dinov2.eval.visualize`."""

from dinov2.eval.visualize.command import main

if __name__ == "__main__":
    raise SystemExit(main())
