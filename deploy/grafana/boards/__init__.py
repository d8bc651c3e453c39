"""Grafana dashboards as code: queries (``panels``), what is shown (``dashboards``), the files (``document``)."""
