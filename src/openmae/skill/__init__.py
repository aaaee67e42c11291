"""The agent skill: a folder for coding agents and NVIDIA's runner, and the code that builds and validates it."""

from pathlib import Path

NAME = "tao-train-mask-auto-encoder"
FOLDER = Path(__file__).parent / NAME
COMMAND = "mae skill build"
