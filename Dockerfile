# Mambino and all that it needs. It opens with the page, and prints its address and a key for the API:
#   docker build -t mambino .                           # for NVIDIA cards: --build-arg TORCH=cuda, then run --gpus=all
#   docker run --rm -it -p 8000:8000 -v "$PWD:/work" mambino
#   docker run --rm -it -v "$PWD:/work" mambino mambino train --dataset=mine
# Data and runs are in /work: the folder that -v names, else a volume of its own.
FROM python:3.12-slim
ARG TORCH=cpu

# g++ compiles the fast operations at the first start; without it everything runs all the same, later
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# torch before the rest: it is the large part, and stays as it is while the sources change
WORKDIR /src
COPY requirements.txt .
RUN version=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.txt) \
    && case "$TORCH" in \
        cpu) pip install --no-cache-dir "torch==$version" --index-url https://download.pytorch.org/whl/cpu ;; \
        cuda) pip install --no-cache-dir "torch==$version" ;; \
        *) echo "TORCH=$TORCH: it is cpu or cuda" >&2; exit 2 ;; \
    esac
COPY . .
RUN pip install --no-cache-dir '.[serve,office,export]'

# Whose files -v names may be another user's: docker run --user "$(id -u)"
RUN useradd --create-home mambino && install --directory --owner=mambino /work
USER mambino
ENV XDG_CACHE_HOME=/work/.cache PYTHONUNBUFFERED=1
WORKDIR /work
VOLUME /work

EXPOSE 8000
# 503 is a server without a model, as it is before the first training: only one that is broken says 500
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import http.client, sys; \
    asked = http.client.HTTPConnection('127.0.0.1', 8000, timeout=5); \
    asked.request('GET', '/health'); \
    sys.exit(asked.getresponse().status not in (200, 503))"]
CMD if [ -z "$MAMBINO_API_KEY" ]; then \
        MAMBINO_API_KEY=$(python -c 'import secrets; print(secrets.token_urlsafe(24))'); \
        export MAMBINO_API_KEY; \
        echo "MAMBINO_API_KEY=$MAMBINO_API_KEY"; \
    fi; \
    exec mambino serve --host=0.0.0.0
