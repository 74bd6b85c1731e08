"""The steps of a run as Prefect tasks; the only package that holds any."""
