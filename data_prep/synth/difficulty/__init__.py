"""How hard a problem is: measured by models that answer it, then told by an estimator that needs none."""
