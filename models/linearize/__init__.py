"""Offline training of linearized language models; never needed to serve one."""
