//! GRUB for BIOS and for UEFI, made as files: nothing is installed on, or read from, a device.
//!
//! BIOS: the MBR (`boot.img`) loads the first sector of the core, which loads the rest; both know where by sector numbers
//! that grub-bios-setup writes into them (GRUB 2, `util/setup.c`), and which are written here in its stead, because that
//! program wants a block device. UEFI: one program at the place that firmware looks at on a disk it has never seen.

use super::gpt::SECTOR;
use super::{BuildError, failed};
use crate::process::Run;
use std::path::{Path, PathBuf};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(120);
/// Where GRUB's packages put its parts.
const PARTS: &str = "/usr/lib/grub";
/// The file system of GRUB's menu, on the disk that GRUB came from; partition 3 is the root.
const PREFIX: &str = "(,gpt3)/boot/grub";
/// What both need to read the menu and start Linux.
const MODULES: [&str; 14] = [
    "part_gpt",
    "ext2",
    "normal",
    "linux",
    "configfile",
    "echo",
    "test",
    "search",
    "search_label",
    "serial",
    "terminal",
    "gzio",
    "halt",
    "reboot",
];

/// In `boot.img`: the core's first sector, 8 bytes (`GRUB_BOOT_MACHINE_KERNEL_SECTOR`).
const BOOT_KERNEL_SECTOR: usize = 0x5c;
/// In `boot.img`: a jump that distrusts the drive number of some BIOSes (`GRUB_BOOT_MACHINE_DRIVE_CHECK`); two no-ops on hard disks.
const BOOT_DRIVE_CHECK: usize = 0x66;
const NOPS: [u8; 2] = [0x90, 0x90];
/// In the core's first sector: the last of its list of sectors, 12 bytes: first sector, how many, segment.
const CORE_LIST: usize = 0x200 - 12;
/// The segment that the rest of the core is loaded to (`GRUB_BOOT_MACHINE_KERNEL_SEG` and the sector before).
const CORE_SEGMENT: u16 = 0x820;

/// The menu. Debian keeps the links `/vmlinuz` and `/initrd.img` at its newest kernel, so that upgrades need no GRUB in the guest.
pub(crate) const MENU: &str = "\
# Debian keeps the links /vmlinuz and /initrd.img at the newest kernel, so this file need not change with upgrades.
serial --unit=0 --speed=115200
terminal_input serial console
terminal_output serial console
set gfxpayload=text
set timeout_style=hidden
set timeout=1
set default=0
menuentry \"Debian\" {
    linux /vmlinuz root=LABEL=rootfs ro console=tty0 console=ttyS0,115200 quiet
    initrd /initrd.img
}
menuentry \"Debian, the kernel before\" {
    linux /vmlinuz.old root=LABEL=rootfs ro console=tty0 console=ttyS0,115200
    initrd /initrd.img.old
}
";

/// GRUB for BIOS, made for a core at a certain sector.
#[derive(Debug)]
pub(crate) struct Bios {
    /// The MBR's code.
    pub(crate) boot: Vec<u8>,
    /// The core, whole sectors.
    pub(crate) core: Vec<u8>,
}

/// Makes GRUB for BIOS with its core from sector `first` on.
///
/// # Errors
/// When a part is missing or is not what it should be.
pub(crate) fn bios(scratch: &Path, first: u64) -> Result<Bios, BuildError> {
    let path = Path::new(PARTS).join("i386-pc/boot.img");
    let boot = std::fs::read(&path).map_err(failed("read", &path))?;
    let path = mkimage(scratch, "i386-pc", "core.img", &["biosdisk"])?;
    let core = std::fs::read(&path).map_err(failed("read", &path))?;
    patched(boot, core, first).ok_or(BuildError::Grub { path })
}

/// Makes GRUB for UEFI; the program's path.
///
/// # Errors
/// When a part is missing.
pub(crate) fn efi(scratch: &Path) -> Result<PathBuf, BuildError> {
    mkimage(scratch, "x86_64-efi", "BOOTX64.EFI", &["fat", "efi_gop", "all_video"])
}

fn mkimage(scratch: &Path, format: &str, name: &str, more: &[&str]) -> Result<PathBuf, BuildError> {
    let path = scratch.join(name);
    let mut run = Run::new("grub-mkimage", DEADLINE)
        .arg("--format")
        .arg(format)
        .arg("--output")
        .arg(&path)
        .arg("--prefix")
        .arg(PREFIX);
    for module in MODULES.iter().chain(more) {
        run = run.arg(*module);
    }
    run.output().map_err(BuildError::program("make GRUB"))?;
    Ok(path)
}

/// Writes into both where the core lies. `None` when they are not built as expected.
fn patched(mut boot: Vec<u8>, mut core: Vec<u8>, first: u64) -> Option<Bios> {
    core.resize(core.len().next_multiple_of(SECTOR as usize), 0);
    let sectors = core.len() as u64 / SECTOR;
    let list = core.get_mut(CORE_LIST..0x200)?;
    if boot.len() != SECTOR as usize || list[10..] != CORE_SEGMENT.to_le_bytes() || sectors < 2 {
        return None;
    }
    list[..8].copy_from_slice(&(first + 1).to_le_bytes());
    list[8..10].copy_from_slice(&u16::try_from(sectors - 1).ok()?.to_le_bytes());
    boot[BOOT_KERNEL_SECTOR..BOOT_KERNEL_SECTOR + 8].copy_from_slice(&first.to_le_bytes());
    boot[BOOT_DRIVE_CHECK..BOOT_DRIVE_CHECK + 2].copy_from_slice(&NOPS);
    Some(Bios { boot, core })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_stages_are_told_where_the_core_lies() {
        let mut core = vec![1; 3 * 512 + 7];
        core[CORE_LIST + 10..0x200].copy_from_slice(&CORE_SEGMENT.to_le_bytes());
        let bios = patched(vec![0; 512], core.clone(), 2048).unwrap();
        assert_eq!(bios.core.len(), 4 * 512);
        assert_eq!(bios.boot[0x5c..0x64], 2048u64.to_le_bytes());
        assert_eq!(bios.core[CORE_LIST..CORE_LIST + 8], 2049u64.to_le_bytes());
        assert_eq!(bios.core[CORE_LIST + 8..CORE_LIST + 10], 3u16.to_le_bytes());
        // Parts of another make are not guessed about.
        assert!(patched(vec![0; 510], core.clone(), 2048).is_none());
        core[CORE_LIST + 10] ^= 1;
        assert!(patched(vec![0; 512], core, 2048).is_none());
        assert!(patched(vec![0; 512], vec![], 2048).is_none());
    }
}
