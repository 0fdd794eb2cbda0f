# Targets: setup demo test serve lint clean. `make demo` and `make test` on a bare clone set everything up first.
SHELL := bash
VENV := .venv
PY := $(VENV)/bin/python
REQUIREMENTS := requirements.txt requirements-server.txt
# Set-up is done when the stamp of the present requirements is there.
STAMP := $(VENV)/.setup-$(shell cat $(REQUIREMENTS) | sha256sum | cut -c1-16)
# The tests also run expert workers, which need the optional Ray.
WORKERS_STAMP := $(VENV)/.workers-$(shell cat requirements-workers.txt | sha256sum | cut -c1-16)
# The interpreter to make the environment with: Python 3.11 or 3.12 with a shared libpython. Default: the first on PATH.
PYTHON ?=
# The tests that need neither minutes nor a GPU; as in pyproject.toml, whose -m another one replaces.
SUITE := not slow and not gpu
# Further arguments of the command that a target runs, such as: make serve ARGS="--http-port 9000 -- --ttft-slo 0.5"
ARGS ?=

.PHONY: setup demo test serve lint clean

setup: $(STAMP)

$(STAMP): | $(VENV)/.made
	$(PY) -m pip install "$$(grep '^torch==' requirements.txt)"
	$(PY) -m pip install -r requirements.txt
	test -x /opt/tritonserver/bin/tritonserver || $(PY) -m pip install --no-deps -r requirements-server.txt
	$(PY) -m backend.kernels.cpu.warm_up
	@rm -f $(VENV)/.setup-*
	@touch $@
	@echo "Set-up is done: $(VENV)"

# An environment that is there and has a working pip is kept, whatever made it; a half-made one is made again.
$(VENV)/.made:
	@set -eu; \
	if $(PY) -m pip --version > /dev/null 2>&1; then $(PY) -m backend.serving.triton_server; touch $@; exit; fi; \
	chosen=; reasons=; \
	for name in $(or $(PYTHON),python3.11 python3.12 python3); do \
	  if reason=$$("$$name" -m backend.serving.triton_server 2>&1); then chosen=$$name; break; fi; \
	  reasons="$$reasons"$$'\n'"  $$name: $${reason##*$$'\n'}"; \
	done; \
	if [ -z "$$chosen" ]; then \
	  echo "No usable Python; name another with: make setup PYTHON=/path/to/python3.11$$reasons" >&2; exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$chosen" --version) ($$chosen)"; \
	"$$chosen" -m venv --clear $(VENV); \
	touch $@

$(WORKERS_STAMP): $(STAMP)
	$(PY) -m pip install -r requirements-workers.txt
	@touch $@

demo: setup
	$(PY) -m loadtest.demo $(if $(TRACE),--trace "$(TRACE)") $(ARGS)

test: setup $(WORKERS_STAMP)
ifeq ($(strip $(ARGS)),)
	@# Two at a time: the tests of whole servers, which mostly wait, and all others. What the first say is shown at the end.
	@# Then those that hold the server to a time, with nothing beside them.
	@log=$$(mktemp); $(PY) -m pytest tests/server -m "$(SUITE) and not timed" > "$$log" 2>&1 & servers=$$!; \
	$(PY) -m pytest --ignore tests/server; others=$$?; \
	wait $$servers; status=$$?; cat "$$log"; rm -f "$$log"; \
	$(PY) -m pytest tests/server -m "$(SUITE) and timed"; exit $$((status | others | $$?))
else
	$(PY) -m pytest $(ARGS)
endif

serve: setup
	exec $(PY) -m controller.serve $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf results build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
