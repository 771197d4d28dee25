from fastvae.cli import main

main()
