"""moeyard behind other projects' names and signatures."""
