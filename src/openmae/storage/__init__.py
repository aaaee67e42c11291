"""Files on disks and in object stores: layout, atomic writes, encryption, downloads, cache, locks and mirrors."""
