"""The Slurm of cluster.py with accounting: MariaDB and slurmdbd in the same folder, on ports of their own, so that sacct answers."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

from .cluster import SlurmCluster, free_ports, wait_for

PACKAGES = ("slurmdbd", "mariadb-server-core")
PROGRAMS = ("slurmdbd", "mariadbd", "sacct", "sacctmgr")
DBD = """\
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=root
StorageLoc=accounting
LogFile={root}/slurmdbd.log
PidFile={root}/slurmdbd.pid
"""


class AccountedCluster(SlurmCluster):
    def _configure(self) -> None:
        super()._configure()
        self.port, self.database_port = free_ports(2)
        config = self.root / "slurm.conf"
        lines = [
            "AccountingStorageType=accounting_storage/slurmdbd",
            "AccountingStorageHost=127.0.0.1",
            f"AccountingStoragePort={self.port}",
            f"AccountingStoragePass={self.root}/munge/socket",
            "MinJobAge=2",
        ]
        kept = [line for line in config.read_text(encoding="utf-8").splitlines() if not line.startswith("MinJobAge")]
        config.write_text("\n".join([*lines, *kept]) + "\n", encoding="utf-8")
        dbd = self.root / "slurmdbd.conf"
        dbd.write_text(DBD.format(root=self.root, port=self.port, database_port=self.database_port), encoding="utf-8")
        dbd.chmod(0o600)

    def _before_controller(self) -> None:
        data = self.root / "database"
        data.mkdir()
        tables = (Path("/usr/share/mysql") / f"mysql_system_tables{part}.sql" for part in ("", "_data"))
        script = "create database mysql;\nuse mysql;\n" + "".join(file.read_text(encoding="utf-8") for file in tables)
        # What mariadb-install-db does; that script wants a tool of the client's package.
        subprocess.run(
            ["mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", "--bootstrap"],
            input=script, text=True, check=True, capture_output=True,
        )  # fmt: skip
        small = ("--innodb-buffer-pool-size=16M", "--innodb-log-file-size=4M", "--innodb-flush-log-at-trx-commit=0")
        self._spawn(
            "mariadbd", "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-grant-tables",
            "--bind-address=127.0.0.1", f"--port={self.database_port}", f"--socket={self.root}/database.sock", *small,
        )  # fmt: skip
        wait_for(lambda: listens(self.database_port), 180, "MariaDB")
        self._spawn("slurmdbd", "slurmdbd", "-D")
        wait_for(lambda: listens(self.port), 180, "slurmdbd")
        self.ask("sacctmgr", "--immediate", "add", "cluster", "test")


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
