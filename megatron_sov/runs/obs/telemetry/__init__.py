"""What a run tells to the systems that watch a cluster: OpenTelemetry, Prometheus, webhooks; and what its
GPUs take.  Off unless the settings `obs.*` ask for it; whatever fails here never ends a run nor waits for
long."""
