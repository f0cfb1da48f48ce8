"""Ask for email verification codes and check them."""
