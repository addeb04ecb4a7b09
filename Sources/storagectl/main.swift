import HapteraCLI
