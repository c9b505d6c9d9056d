"""The experiments of TENGraD's paper: configurations, runs that can be taken up again, measurements and the report."""
