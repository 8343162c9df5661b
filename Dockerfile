# The image of the exporter: Python, what it imports and the exporter, without shell or package manager. 54 MB of files,
# 20 MB compressed.
#
#   make image
#
# The base is pinned by digest, what comes from PyPI by the hashes of requirements/run.txt, and what Debian adds by its
# signed stable release. /usr/share/sbom.cdx.json in the image lists all of it (CycloneDX).
ARG BASE=debian:trixie-slim@sha256:a29215f6a35e51e22adffa17f89e9d2ef06214e64a2bad10d765c46aea49f11f

FROM ${BASE} AS build
RUN apt-get update && \
    apt-get install -y --no-install-recommends ca-certificates python3 python3-venv && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /src
# What changes seldom comes first.
COPY requirements/run.txt requirements/
RUN python3 -m venv /opt/shoal && \
    /opt/shoal/bin/pip install --no-cache-dir --no-compile --require-hashes -r requirements/run.txt
COPY pyproject.toml README.md LICENSE ./
COPY exporter exporter
# The package links to them.
COPY rules/runbooks rules/runbooks
RUN /opt/shoal/bin/pip install --no-cache-dir --no-compile --no-deps --no-build-isolation .
COPY image image
RUN /opt/shoal/bin/python image/rootfs.py /rootfs

FROM scratch
COPY --from=build /rootfs /
# OpenSSL looks for certificates where Debian has links to this file.
ENV PATH=/opt/shoal/bin PYTHONDONTWRITEBYTECODE=1 SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
# By number, so that Kubernetes can tell that it is not root. Tiers with capabilities run it as root by their own word.
USER 65534:65534
EXPOSE 7462
ENTRYPOINT ["shoal-exporter"]
# Loopback in a container is nobody's. What runs it in the node's network names the node's address instead.
CMD ["--web.listen-address=:7462"]
