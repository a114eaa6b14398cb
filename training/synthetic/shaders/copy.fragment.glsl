in vec2 texel;
uniform sampler2D source;
uniform float spread;
out vec4 colour;

void main() {
    vec2 d = vec2(spread, -spread);
    colour = .25 * (texture(source, texel + d.xx) + texture(source, texel + d.xy) + texture(source, texel + d.yx)
        + texture(source, texel + d.yy));
}
