# Everything a newcomer runs. Each target makes its own .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all bench lint clean

# Without a GPU, TORCH="--index-url URL torch" with the URL of PyTorch's CPU wheels saves gigabytes of CUDA packages.
TORCH ?= torch

$(VENV)/%.done: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

demo: $(VENV)/demo.done
	$(BIN)/python demo/fetch.py
	$(BIN)/python retrieve.py build --data demo/data/traces.jsonl --out index/traces
	$(BIN)/python ttt.py --max-new-tokens 256 --question "My mother, 71, has had a painful swollen calf since her knee \
	operation ten days ago and is now short of breath. What could this be, and what should be done first?"

test: $(VENV)/test.done
	$(BIN)/python demo/fetch.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(VENV)/test.done
	$(BIN)/python demo/fetch.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --heavy

bench: $(VENV)/bench.done
	$(BIN)/python demo/fetch.py
	$(BIN)/python bench/run.py

lint: $(VENV)/test.done
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) bench/results *.egg-info .pytest_cache .ruff_cache .hypothesis  # models/ and runs/ are the user's
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
