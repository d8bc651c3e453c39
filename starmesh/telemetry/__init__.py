"""Every span and attribute name (``names``), every metric (``registry``), and the set-up of tracing and logging
(``setup``) and of metrics (``metrics``)."""
