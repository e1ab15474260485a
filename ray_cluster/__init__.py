"""Everything that knows Ray: clusters that come up and go away, runs as Ray jobs, trials of a sweep.

The folder is not called `ray`: with the repository's root on `sys.path` it would hide the library. Importing the package
loads nothing; what needs ray imports it when it is called.
"""
