"""The report: one HTML file of a run, of a sweep, or of two runs side by side, that opens from disk and asks no network.

    a run record or sweep.json -> run | sweep | compare (what is told, as sections) -> page (one file)

It is made from those JSON files alone, whoever wrote them and when: a field that an older one lacks costs the part that shows it.
Names and texts in them come from models and people; every one is escaped, in the page by Jinja and in figures by `figures.plain`.
"""
