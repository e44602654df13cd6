"""Files of trainers and launchers, read as requests and written from plans: one module per format, with the upstream names beside ours."""
