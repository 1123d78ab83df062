"""`python -m moeyard.integrations.vllm SCRIPT [ARGUMENT ...]`: runs a script whose vLLM imports lead to moeyard."""

import sys

from moeyard.integrations.launch import main

sys.exit(main(sys.argv))
