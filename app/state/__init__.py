"""What outlives a request: public facts of the Hub, posted measurements, corrections with their history, keys. Nothing private."""
