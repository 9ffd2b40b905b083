from tcq.cli import console

console()
