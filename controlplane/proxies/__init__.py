"""SOCKS5 proxies."""
