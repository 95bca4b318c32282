# Everything a newcomer runs. Each target makes its own .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo chain synth test test-all test-gpu mutants bench lint clean

# Without a GPU, TORCH="--index-url URL torch" with the URL of PyTorch's CPU wheels saves gigabytes of CUDA packages.
TORCH ?= torch

$(VENV)/%.done: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

QUESTION = My mother, 71, has had a painful swollen calf since her knee operation ten days ago and is now short of \
	breath. What could this be, and what should be done first?

# The first answer: fetch two small models, index the traces, adapt to the nearest, answer, restore.
demo: index/traces/manifest.json
	$(BIN)/python ttt.py --model models/smollm2-135m-instruct --max-new-tokens 256 --question "$(QUESTION)"
	@echo
	@echo 'Next:  . $(VENV)/bin/activate'
	@echo '       python ttt.py --question "…"              your own question; --no-ttt: without adapting'
	@echo '       python ttt.py --chat                      ask in turns'
	@echo '       make chain                                train all stages in miniature (minutes), answer again'

index/traces/manifest.json: $(VENV)/demo.done
	$(BIN)/python demo/fetch.py
	$(BIN)/python retrieve.py build --data demo/data/traces.jsonl --out index/traces

# Three texts through the data pipeline, then the same question to a model that has gone through SFT 1, 2, 3, the cold
# start and DPO. The stages train on demo/data, because what a model of this size writes is no data set.
chain: synth index/traces/manifest.json runs/demo-dpo/model/config.json
	$(BIN)/python ttt.py --model runs/demo-dpo/model --max-new-tokens 256 --question "$(QUESTION)"

# Texts in, rows out, counted stage by stage; a second run asks nothing again.
synth: index/traces/manifest.json $(VENV)/synth.done
	$(BIN)/python synth.py run --corpus demo/data/texts.jsonl --teacher local:models/smollm2-135m-instruct --same-judge \
		--out runs/demo-synth --json > /dev/null
	@echo "$$(cat runs/demo-synth/FineMed-SFT/*.jsonl 2> /dev/null | wc -l) rows of 3 texts: a teacher of 135M parameters" \
		"writes poor JSON. What was dropped, and why: runs/demo-synth/README.md and failed.jsonl"

# The paper's stages in miniature: its learning rates, but for DPO's (ten steps at 1e-7 would show nothing), small
# batches. Each prints what its held-out loss was and is. A finished stage is not trained again.
SMALL = --batch-size 4 --epochs 2 --val-rows 8 --save-every 0 --resume --out $(@D:/model=)
trained = rm -r $(@D:/model=)/checkpoints  # 1.6 GB each

runs/demo-stage1/model/config.json: index/traces/manifest.json
	$(BIN)/python sft.py --stage 1 $(SMALL) --model models/smollm2-135m-instruct --data demo/data/sft_all.jsonl
	$(trained)
runs/demo-stage2/model/config.json: runs/demo-stage1/model/config.json
	$(BIN)/python sft.py --stage 2 $(SMALL) --model $(<D) --data demo/data/sft_internal_medicine.jsonl
	$(trained)
runs/demo-stage3/model/config.json: runs/demo-stage2/model/config.json
	$(BIN)/python sft.py --stage 3 $(SMALL) --model $(<D) --data demo/data/sft_endocrinology.jsonl
	$(trained)
runs/demo-cold-start/model/config.json: runs/demo-stage3/model/config.json
	$(BIN)/python sft.py --stage cold-start $(SMALL) --epochs 1 --model $(<D) --data demo/data/traces.jsonl
	$(trained)
runs/demo-dpo/model/config.json: runs/demo-cold-start/model/config.json
	$(BIN)/python dpo.py $(SMALL) --epochs 1 --lr 1e-6 --model $(<D) --data demo/data/pairs.jsonl
	$(trained)

test: $(VENV)/test.done
	$(BIN)/python demo/fetch.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -n 2 --dist worksteal

test-all: $(VENV)/test.done
	$(BIN)/python demo/fetch.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -n 2 --dist worksteal --heavy

test-gpu: $(VENV)/test.done
	$(BIN)/python -m pytest -rs --gpu tests/test_gpu.py

# Breaks the code a line at a time: each time the named test must fail (minutes).
mutants: $(VENV)/test.done
	$(BIN)/python demo/fetch.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

bench: $(VENV)/bench.done
	$(BIN)/python demo/fetch.py
	$(BIN)/python bench/inference.py

lint: $(VENV)/test.done
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) bench/results *.egg-info .pytest_cache .ruff_cache .hypothesis  # models/ and runs/ are the user's
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
