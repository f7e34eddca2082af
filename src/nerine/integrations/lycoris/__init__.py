"""LyCORIS's names, for programs that embed it: `nerine.lycoris` shows them."""
