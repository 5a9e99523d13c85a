# A machine for the commands, with torch for a CPU:
#   docker build -t mambino .
#   docker run --rm -it -v "$PWD/files:/files" -v mambino-data:/mambino/data mambino python prepare.py /files
FROM python:3.12-slim

# g++ compiles the fast operations at the first start; without it everything runs all the same, later
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /mambino
COPY requirements.txt .
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir -r requirements.txt
COPY . .

CMD ["python", "train.py", "--help"]
