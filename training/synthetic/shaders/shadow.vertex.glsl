// Depth as the key light sees it.
in vec3 position;

void main() {
    gl_Position = lamp * vec4(position, 1);
}
