"""``python -m thaw_vllm`` is the ``thaw`` command, also where that is not on the path."""

from .cli.main import main

raise SystemExit(main())
