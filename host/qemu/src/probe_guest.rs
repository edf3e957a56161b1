//! The probe's guest: a boot sector, assembled by hand, that does what guests do and says whether it came out right.

/// What it writes to port 0xf4 when its sum is right; QEMU's `isa-debug-exit` ends with `(value << 1) | 1`.
pub(crate) const RIGHT: u8 = 0x21;
/// QEMU's exit status then.
pub(crate) const EXIT_RIGHT: i32 = ((RIGHT as i32) << 1) | 1;
/// QEMU's exit status when the guest computed wrongly.
pub(crate) const EXIT_WRONG: i32 = (0x10 << 1) | 1;
/// SeaBIOS does not boot a virtio disk without a single cylinder.
const DISK_BYTES: usize = 1 << 20;
const SECTOR_BYTES: usize = 512;

/// The guest's disk.
pub(crate) fn disk() -> Vec<u8> {
    let mut disk = vec![0; DISK_BYTES];
    disk[..CODE.len()].copy_from_slice(CODE);
    disk[SECTOR_BYTES - 2..SECTOR_BYTES].copy_from_slice(&[0x55, 0xaa]);
    disk
}

/// Loaded and entered by the firmware at 0x7c00. GNU as made the bytes from what stands beside them.
#[rustfmt::skip]
const CODE: &[u8] = &[
    // real mode, as the firmware leaves it at 0x7c00
    0xfa,                                                        // 000 cli
    0xfc,                                                        // 001 cld
    0x31, 0xc0,                                                  // 002 xor ax,ax
    0x8e, 0xd8,                                                  // 004 mov ds,ax
    0x8e, 0xc0,                                                  // 006 mov es,ax
    0x8e, 0xd0,                                                  // 008 mov ss,ax
    0xbc, 0x00, 0x7c,                                            // 00a mov sp,0x7c00
    0xea, 0x12, 0x7c, 0x00, 0x00,                                // 00d jmp 0x0:0x7c12
    // one timer interrupt, by the firmware's vector
    0xfb,                                                        // 012 sti
    0xf4,                                                        // 013 hlt
    0xfa,                                                        // 014 cli
    // 200 exits in real mode
    0xbe, 0xc8, 0x00,                                            // 015 mov si,0xc8
    0x66, 0x31, 0xc0,                                            // 018 xor eax,eax
    0x0f, 0xa2,                                                  // 01b cpuid
    0xe6, 0x80,                                                  // 01d out 0x80,al
    0x4e,                                                        // 01f dec si
    0x75, 0xf6,                                                  // 020 jne 0x18
    // PML4 at 0x1000, PDPT at 0x2000, PD at 0x3000: 16 pages of 2 MiB, one to one
    0xbf, 0x00, 0x10,                                            // 022 mov di,0x1000
    0x66, 0x31, 0xc0,                                            // 025 xor eax,eax
    0xb9, 0x00, 0x0c,                                            // 028 mov cx,0xc00
    0x66, 0xf3, 0xab,                                            // 02b rep stos DWORD PTR es:[di],eax
    0xc7, 0x06, 0x00, 0x10, 0x03, 0x20,                          // 02e mov WORD PTR ds:0x1000,0x2003
    0xc7, 0x06, 0x00, 0x20, 0x03, 0x30,                          // 034 mov WORD PTR ds:0x2000,0x3003
    0xbf, 0x00, 0x30,                                            // 03a mov di,0x3000
    0x66, 0xb8, 0x83, 0x00, 0x00, 0x00,                          // 03d mov eax,0x83
    0xb9, 0x10, 0x00,                                            // 043 mov cx,0x10
    0x66, 0x89, 0x05,                                            // 046 mov DWORD PTR [di],eax
    0x66, 0x05, 0x00, 0x00, 0x20, 0x00,                          // 049 add eax,0x200000
    0x83, 0xc7, 0x08,                                            // 04f add di,0x8
    0xe2, 0xf2,                                                  // 052 loop 0x46
    // long mode: CR4.PAE, CR3, EFER.LME, GDT, CR0.PG and PE
    0x66, 0xb8, 0x20, 0x00, 0x00, 0x00,                          // 054 mov eax,0x20
    0x0f, 0x22, 0xe0,                                            // 05a mov cr4,eax
    0x66, 0xb8, 0x00, 0x10, 0x00, 0x00,                          // 05d mov eax,0x1000
    0x0f, 0x22, 0xd8,                                            // 063 mov cr3,eax
    0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0,                          // 066 mov ecx,0xc0000080
    0x0f, 0x32,                                                  // 06c rdmsr
    0x80, 0xcc, 0x01,                                            // 06e or ah,0x1
    0x0f, 0x30,                                                  // 071 wrmsr
    0x0f, 0x01, 0x16, 0x20, 0x7d,                                // 073 lgdtw ds:0x7d20
    0x0f, 0x20, 0xc0,                                            // 078 mov eax,cr0
    0x66, 0x0d, 0x01, 0x00, 0x00, 0x80,                          // 07b or eax,0x80000001
    0x0f, 0x22, 0xc0,                                            // 081 mov cr0,eax
    0xea, 0x89, 0x7c, 0x08, 0x00,                                // 084 jmp 0x8:0x7c89
    // 64-bit code
    0xb8, 0x10, 0x00, 0x00, 0x00,                                // 089 mov eax,0x10
    0x8e, 0xd8,                                                  // 08e mov ds,eax
    0x8e, 0xc0,                                                  // 090 mov es,eax
    0x8e, 0xd0,                                                  // 092 mov ss,eax
    // 128 passes over 4 MiB at 16 MiB: write a pattern, reload CR3 (flushes the TLB), sum up
    0x31, 0xdb,                                                  // 094 xor ebx,ebx
    0xbd, 0x80, 0x00, 0x00, 0x00,                                // 096 mov ebp,0x80
    0xbf, 0x00, 0x00, 0x00, 0x01,                                // 09b mov edi,0x1000000
    0xb9, 0x00, 0x00, 0x08, 0x00,                                // 0a0 mov ecx,0x80000
    0x89, 0xe8,                                                  // 0a5 mov eax,ebp
    0x48, 0x89, 0x07,                                            // 0a7 mov QWORD PTR [rdi],rax
    0x69, 0xc0, 0xb1, 0x79, 0x37, 0x9e,                          // 0aa imul eax,eax,0x9e3779b1
    0xff, 0xc0,                                                  // 0b0 inc eax
    0x48, 0x83, 0xc7, 0x08,                                      // 0b2 add rdi,0x8
    0xff, 0xc9,                                                  // 0b6 dec ecx
    0x75, 0xed,                                                  // 0b8 jne 0xa7
    0x0f, 0x20, 0xd8,                                            // 0ba mov rax,cr3
    0x0f, 0x22, 0xd8,                                            // 0bd mov cr3,rax
    0xbe, 0x00, 0x00, 0x00, 0x01,                                // 0c0 mov esi,0x1000000
    0xb9, 0x00, 0x00, 0x08, 0x00,                                // 0c5 mov ecx,0x80000
    0x48, 0x03, 0x1e,                                            // 0ca add rbx,QWORD PTR [rsi]
    0x48, 0xd1, 0xc3,                                            // 0cd rol rbx,1
    0x48, 0x83, 0xc6, 0x08,                                      // 0d0 add rsi,0x8
    0xff, 0xc9,                                                  // 0d4 dec ecx
    0x75, 0xf2,                                                  // 0d6 jne 0xca
    0xff, 0xcd,                                                  // 0d8 dec ebp
    0x75, 0xbf,                                                  // 0da jne 0x9b
    // 1000 exits in long mode
    0x48, 0x89, 0xdf,                                            // 0dc mov rdi,rbx
    0xbd, 0xe8, 0x03, 0x00, 0x00,                                // 0df mov ebp,0x3e8
    0x31, 0xc0,                                                  // 0e4 xor eax,eax
    0x0f, 0xa2,                                                  // 0e6 cpuid
    0xe6, 0x80,                                                  // 0e8 out 0x80,al
    0xff, 0xcd,                                                  // 0ea dec ebp
    0x75, 0xf6,                                                  // 0ec jne 0xe4
    // the sum as computed below; 0x21 on port 0xf4 says right, 0x10 wrong
    0x48, 0xb8, 0x18, 0xf5, 0x18, 0x7f, 0x54, 0x6c, 0x54, 0x6a,  // 0ee movabs rax,0x6a546c547f18f518
    0x48, 0x39, 0xc7,                                            // 0f8 cmp rdi,rax
    0xb8, 0x10, 0x00, 0x00, 0x00,                                // 0fb mov eax,0x10
    0x75, 0x02,                                                  // 100 jne 0x104
    0xb0, 0x21,                                                  // 102 mov al,0x21
    0xe6, 0xf4,                                                  // 104 out 0xf4,al
    0xf4,                                                        // 106 hlt
    // filler, then the GDT: none, 64-bit code, data; and its register
    0x90,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x9a, 0x20, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x92, 0x00, 0x00,
    0x17, 0x00, 0x08, 0x7d, 0x00, 0x00,
];

#[cfg(test)]
mod tests {
    use super::*;

    const PASSES: u32 = 128;
    const WORDS: usize = 0x8_0000;

    #[test]
    fn the_sum_in_the_code_is_what_the_code_should_compute() {
        let mut sum = 0_u64;
        for pass in (1..=PASSES).rev() {
            let mut word = pass;
            for _ in 0..WORDS {
                sum = sum.wrapping_add(word.into()).rotate_left(1);
                word = word.wrapping_mul(0x9e37_79b1).wrapping_add(1);
            }
        }
        assert_eq!(CODE[0xf0..0xf8], sum.to_le_bytes());
        assert_eq!(CODE[0x97..0x9b - 1], PASSES.to_le_bytes()[..3]);
        assert_eq!(CODE[0x103], RIGHT);
        assert!(CODE.len() <= 510, "fits in a boot sector");
        assert_eq!(disk()[510..512], [0x55, 0xaa]);
    }
}
