# Everything a newcomer runs. Each target makes its own .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all bench lint clean

# constraints.txt pins torch==2.13.0: on a machine without a GPU point pip at a CPU wheel of it, or CUDA comes along.
$(VENV)/%.done: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

demo: $(VENV)/demo.done
	$(BIN)/python demo/fetch.py
	$(BIN)/python retrieve.py build --data demo/data/traces.jsonl --out index/traces
	$(BIN)/python ttt.py --max-new-tokens 256 --question "My mother, 71, has had a painful swollen calf since her knee \
	operation ten days ago and is now short of breath. What could this be, and what should be done first?"

test: $(VENV)/test.done
	$(BIN)/python demo/fetch.py
	$(BIN)/python -m pytest

test-all: $(VENV)/test.done
	$(BIN)/python demo/fetch.py
	$(BIN)/python -m pytest --heavy

bench: $(VENV)/bench.done
	$(BIN)/python demo/fetch.py
	$(BIN)/python bench/run.py

lint: $(VENV)/test.done
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) models index runs evals bench/results *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
