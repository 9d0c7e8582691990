"""What a run tells the world: metrics, writers, wall-time split, live view, curves, summary.

Nothing is imported here, so that `import trinity_jax.monitor` stays free of heavy packages.
"""
