//! Picks the kernel modules of the guest and puts them in loading order.
//!
//! The order comes from the modules themselves (`depends=` in their .modinfo section), so that it is right for every kernel
//! release: on Debian 12 that is virtio, virtio_ring, virtio_pci_legacy_dev, virtio_pci_modern_dev, virtio_pci, ...

use crate::process::Run;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Without these there is no guest.
const REQUIRED: [&str; 3] = ["virtio_pci", "virtio_blk", "virtio_net"];
/// Power button, its events, entropy, shared memory free for the host to take back.
const OPTIONAL: [&str; 4] = ["button", "evdev", "virtio_rng", "virtio_balloon"];
const MODULE_BYTES_MAX: u64 = 16 << 20;
const DIRECTORY_DEPTH_MAX: usize = 16;

/// One module to load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Module {
    /// Its name with underscores.
    pub(crate) name: String,
    /// Its ELF file, no longer compressed.
    pub(crate) content: Vec<u8>,
}

/// The modules of one kernel.
pub(crate) struct Tree {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
    busybox: PathBuf,
}

impl Tree {
    /// Looks through `/lib/modules/RELEASE`. `busybox` unpacks .xz modules.
    ///
    /// # Errors
    /// A message when the directory cannot be read.
    pub(crate) fn open(directory: &Path, busybox: &Path) -> Result<Self, String> {
        let mut files = BTreeMap::new();
        let kernel = directory.join("kernel");
        walk(&kernel, DIRECTORY_DEPTH_MAX, &mut files)
            .map_err(|error| format!("reading {}: {error}", kernel.display()))?;
        let builtin = std::fs::read_to_string(directory.join("modules.builtin")).unwrap_or_default();
        let builtin = builtin
            .lines()
            .filter_map(|line| module_name(line.rsplit('/').next()?))
            .collect();
        Ok(Tree {
            files,
            builtin,
            busybox: busybox.into(),
        })
    }

    /// The guest's modules, each after those it needs.
    ///
    /// # Errors
    /// A message that names the module that is missing or cannot be read.
    pub(crate) fn in_loading_order(&self) -> Result<Vec<Module>, String> {
        let mut picked = Vec::new();
        for name in REQUIRED {
            self.pick(name, &mut picked, &mut BTreeSet::new())?;
        }
        for name in OPTIONAL {
            if self.files.contains_key(name) {
                self.pick(name, &mut picked, &mut BTreeSet::new())?;
            }
        }
        Ok(picked)
    }

    /// Adds `name` and before it what it depends on. `above` are the modules that wait for it: a circle is an error.
    fn pick(&self, name: &str, picked: &mut Vec<Module>, above: &mut BTreeSet<String>) -> Result<(), String> {
        if self.builtin.contains(name) || picked.iter().any(|module| module.name == name) {
            return Ok(());
        }
        if !above.insert(name.to_string()) {
            return Err(format!("module {name} depends on itself"));
        }
        let path = self
            .files
            .get(name)
            .ok_or_else(|| format!("it has no module {name}, nor is that built in"))?;
        let content = self.read(path)?;
        for dependency in dependencies(&content) {
            self.pick(&dependency, picked, above)?;
        }
        above.remove(name);
        picked.push(Module {
            name: name.to_string(),
            content,
        });
        Ok(())
    }

    /// Reads a module, unpacking it by its ending.
    fn read(&self, path: &Path) -> Result<Vec<u8>, String> {
        let cannot = |error: &dyn std::fmt::Display| format!("reading {}: {error}", path.display());
        let size = std::fs::metadata(path).map_err(|error| cannot(&error))?.len();
        if size > MODULE_BYTES_MAX {
            return Err(cannot(&"far too large for a module"));
        }
        let deadline = Duration::from_secs(30);
        let unpacked = match path.extension().and_then(|ending| ending.to_str()) {
            Some("xz") => Run::new(&self.busybox.to_string_lossy(), deadline)
                .arg("unxz")
                .arg("-c")
                .arg(path)
                .output(),
            Some("gz") => Run::new(&self.busybox.to_string_lossy(), deadline)
                .arg("zcat")
                .arg(path)
                .output(),
            Some("zst") => Run::new("zstd", deadline).arg("-dcq").arg(path).output(),
            _ => return std::fs::read(path).map_err(|error| cannot(&error)),
        };
        unpacked.map_err(|error| cannot(&error))
    }
}

/// `virtio-rng.ko.xz` is the module `virtio_rng`; `None` for other files.
fn module_name(file: &str) -> Option<String> {
    let (stem, ending) = file.split_once(".ko")?;
    matches!(ending, "" | ".xz" | ".gz" | ".zst").then(|| stem.replace('-', "_"))
}

fn walk(directory: &Path, depth_left: usize, files: &mut BTreeMap<String, PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() && depth_left > 0 {
            walk(&entry.path(), depth_left - 1, files)?;
        } else if kind.is_file()
            && let Some(name) = module_name(&entry.file_name().to_string_lossy())
        {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// The names after `depends=` in a module's .modinfo section: a string that starts after a NUL byte.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &module[at + KEY.len()..];
    let value = &value[..value.iter().position(|&byte| byte == 0).unwrap_or(0)];
    let names = String::from_utf8_lossy(value);
    names
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(modules: &[(&str, &str)], builtin: &str) -> (tempfile::TempDir, Tree) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("kernel")).unwrap();
        for (name, depends) in modules {
            let content = format!("\u{7f}ELF\0license=GPL\0depends={depends}\0name=x\0");
            std::fs::write(directory.path().join("kernel").join(format!("{name}.ko")), content).unwrap();
        }
        std::fs::write(directory.path().join("modules.builtin"), builtin).unwrap();
        let tree = Tree::open(directory.path(), Path::new("busybox")).unwrap();
        (directory, tree)
    }

    #[test]
    fn a_module_comes_after_what_it_needs_and_built_in_ones_are_left_out() {
        let (_directory, tree) = tree(
            &[
                ("virtio_pci", "virtio,virtio-ring"),
                ("virtio", ""),
                ("virtio-ring", "virtio"),
                ("virtio_net", "virtio"),
            ],
            "kernel/drivers/block/virtio_blk.ko\n",
        );
        let names: Vec<String> = tree
            .in_loading_order()
            .unwrap()
            .into_iter()
            .map(|module| module.name)
            .collect();
        assert_eq!(names, ["virtio", "virtio_ring", "virtio_pci", "virtio_net"]);
    }

    #[test]
    fn a_missing_module_and_a_circle_are_named() {
        let (_directory, missing) = tree(&[("virtio_pci", ""), ("virtio_blk", "")], "");
        assert!(missing.in_loading_order().unwrap_err().contains("virtio_net"));
        let (_directory, circle) = tree(&[("virtio_pci", "virtio"), ("virtio", "virtio_pci")], "");
        assert!(circle.in_loading_order().unwrap_err().contains("depends on itself"));
    }
}
