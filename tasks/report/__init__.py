"""The report: one HTML file of a run, of a sweep, or of two runs side by side, that opens from disk and needs no network.

    RunRecord or SweepRecord -> run | sweep | compare (its sections) -> page (one file)

It is made from the records alone, whoever wrote them and when: what an older one does not have costs the part that shows it. Names
and texts in them come from models and people; every one is escaped, in the page by Jinja and in figures by `plots.plain`.
"""
