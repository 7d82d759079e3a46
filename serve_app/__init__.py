"""The Ray Serve application: Kronos forecasts over HTTP."""
