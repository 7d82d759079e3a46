"""Where candles come from: files, Qlib folders, a simulator; what is wrong with them, and which windows they offer."""
