"""`python -m moeyard`: the `moeyard` command."""

from moeyard_command import main

if __name__ == "__main__":
    main()
