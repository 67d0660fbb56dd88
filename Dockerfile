# One image for the gateway, the control plane, the reconciler and the migration: the command
# chooses. It has no embedded servers: Redis (or Valkey) and Postgres are yours.
#   docker build -t tallygate .
#   docker run -e TALLYGATE_REDIS_URL=… -e TALLYGATE_POSTGRES_URL=… -e TALLYGATE_KEY_PEPPER=… \
#     -v ./config.yaml:/etc/tallygate/config.yaml:ro -p 8080:8080 tallygate

FROM python:3.13-slim AS build
WORKDIR /src
# Dependencies first: they change less often than the code.
COPY requirements/image.txt requirements/image.txt
RUN python -m venv /opt/tallygate \
 && /opt/tallygate/bin/pip install --no-cache-dir --require-hashes -r requirements/image.txt
COPY pyproject.toml README.md config.yaml ./
COPY core core
COPY gateway gateway
COPY control control
COPY reconciler reconciler
COPY cli cli
COPY lua lua
RUN /opt/tallygate/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheels . \
 && /opt/tallygate/bin/pip install --no-cache-dir --no-deps /wheels/*.whl \
 && /opt/tallygate/bin/pip uninstall --yes hatchling pip

FROM python:3.13-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin tallygate \
 && install -d -o tallygate -g tallygate /var/lib/tallygate
COPY --from=build /opt/tallygate /opt/tallygate
COPY config.yaml /etc/tallygate/config.yaml
ENV PATH=/opt/tallygate/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001
# What outage mode journals, waits here for the store to come back: mount it.
VOLUME /var/lib/tallygate
WORKDIR /var/lib/tallygate
EXPOSE 8080 8081
STOPSIGNAL SIGTERM
# Asks the process in this container; HEALTH_URL= (empty) where it listens on nothing.
ENV HEALTH_URL=http://127.0.0.1:8080/-/healthz
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
  CMD ["python", "-c", "import os, urllib.request as r; u = os.environ['HEALTH_URL']; u and r.urlopen(u, timeout=2)"]
ENTRYPOINT ["tallygate"]
CMD ["gateway", "--config", "/etc/tallygate/config.yaml", "--listen", "0.0.0.0:8080"]
