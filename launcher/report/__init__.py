"""One HTML file that tells a run, or several side by side: everything inlined, no network, the same page that `trebuchet ui` serves live.

`collect.py` reads run folders, `charts.py` makes figures with their alt text and table, `compare.py` those of several runs, `page.py`
puts them into `page.jinja`. Left out: anything that a run folder does not hold.
"""
