"""`python -m hetero_async` is `hetero-async`."""

from hetero_async.cli import main

main()
