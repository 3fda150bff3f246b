"""Record learning curves of fully trained configurations, and replay studies on them."""
